"""From raw text to an aligned policy: pretrain -> sft -> reward -> ppo -> merge -> evaluate, chat.

The modules beside this file are those stages; what they are made of is in the packages.
"""

import os
import sys

if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:  # a user's own value is kept
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if "huggingface_hub.constants" in sys.modules:  # it reads the variable only once, when it is imported
        sys.modules["huggingface_hub.constants"].HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]
