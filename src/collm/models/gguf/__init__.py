"""GGUF files: read whole or refused, dequantised once and kept, their tokenizers split as the files say."""

from collm.models.gguf.conversion import convert, fill_cache, load_config, load_model, load_tokenizer
from collm.models.gguf.header import Header, read_header

__all__ = ["Header", "convert", "fill_cache", "load_config", "load_model", "load_tokenizer", "read_header"]
