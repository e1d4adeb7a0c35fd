"""Models: built, loaded, taken apart, made smaller or wider; no Ray and no DeepSpeed."""

import logging

# transformers imports torchao, which tells every process of GPU libraries that it could not load.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
