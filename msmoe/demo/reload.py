"""Open a compressed checkpoint with plain transformers, as someone without msmoe would; run as a script.

python reload.py CHECKPOINT BATCH.safetensors LOGITS.safetensors
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer


def main() -> None:
    checkpoint, batch_file, logits_file = sys.argv[1:]
    is_seq2seq = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    model = kind.from_pretrained(
        checkpoint, trust_remote_code=True, attn_implementation="eager", dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    assert "msmoe" not in sys.modules, "this process must know nothing of msmoe"
    batch = load_file(batch_file)
    with torch.inference_mode():
        logits = model(**batch).logits
    save_file({"logits": logits.contiguous()}, logits_file)
    for source, labels in zip(batch["input_ids"][:3], batch["labels"][:3], strict=True):
        prompt = source if is_seq2seq else source[: int((labels >= 0).nonzero()[0])]
        with torch.inference_mode():
            written = model.generate(input_ids=prompt[None], max_new_tokens=8, do_sample=False)[0]
        text = tokenizer.decode(written if is_seq2seq else written[len(prompt) :], skip_special_tokens=True)
        print(f"{tokenizer.decode(prompt, skip_special_tokens=True)[:90]!r} -> {text.strip()!r}")


main()
