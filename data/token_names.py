"""The names by which special tokens are known in the tokenizers of other projects, the first being ours."""

from __future__ import annotations

MASK_TOKEN = "<|mask|>"
EOS_TOKEN = "<|endoftext|>"
MASK_NAMES = (MASK_TOKEN, "<|mdm_mask|>", "[MASK]", "<mask>")
EOS_NAMES = (EOS_TOKEN, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
BOS_NAMES = ("<|startoftext|>", "<s>", "<bos>", "<|begin_of_text|>", "[CLS]")
UNKNOWN_NAMES = ("<unk>", "[UNK]")
