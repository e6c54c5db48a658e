"""From raw text to an aligned policy: pretrain -> sft -> reward -> ppo -> merge -> evaluate, chat.

The modules beside this file are those stages; what they are made of is in the packages.
"""
