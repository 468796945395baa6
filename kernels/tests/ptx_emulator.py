"""`ptx_machine.assembly` by its former name."""

from ptx_machine.assembly import execute, signed_bytes, words_of

__all__ = ["execute", "signed_bytes", "words_of"]
