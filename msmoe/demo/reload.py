"""Open a compressed checkpoint with plain transformers, as someone without msmoe would; run as a script.

python reload.py CHECKPOINT BATCH.safetensors LOGITS.safetensors
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer


def main() -> None:
    checkpoint, batch_file, logits_file = sys.argv[1:]
    model = AutoModelForSeq2SeqLM.from_pretrained(
        checkpoint, trust_remote_code=True, attn_implementation="eager", dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    assert "msmoe" not in sys.modules, "this process must know nothing of msmoe"
    batch = load_file(batch_file)
    with torch.inference_mode():
        logits = model(**batch).logits
        written = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=8, do_sample=False
        )
    save_file({"logits": logits.contiguous()}, logits_file)
    for source, text in zip(
        batch["input_ids"][:3], tokenizer.batch_decode(written, skip_special_tokens=True), strict=False
    ):
        print(f"{tokenizer.decode(source, skip_special_tokens=True)[:90]!r} -> {text.strip()!r}")


main()
