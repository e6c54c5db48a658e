"""From files and hub datasets to token ids: where rows come from, what a row means, how text becomes tokens."""
