"""From files and hub datasets to token ids: sources of rows, formats of rows, tokenizers."""
