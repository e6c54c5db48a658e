"""A language model from raw text to PPO-aligned policy: stages that meet on disk, and the maths they share."""
