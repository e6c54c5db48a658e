"""Settings for every test, made before anything is imported: no hub, no upload, no threads in the tokenizer."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
