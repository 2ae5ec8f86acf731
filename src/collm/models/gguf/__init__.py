"""GGUF files: read whole or refused, dequantised once and kept, their tokenizers split as the files say.

`header` needs no torch; `conversion` makes models and tokenizers.
"""
