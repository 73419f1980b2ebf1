"""Configuration and model of the compressed checkpoint; both files travel inside it.

The Auto classes are imported first: they register the modules of this folder, which must not be half-way through their
own imports then.
"""

import transformers.models.auto.modeling_auto  # noqa: F401
