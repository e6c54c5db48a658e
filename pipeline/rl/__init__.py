"""What PPO is made of beside its loop (`pipeline.ppo`): set-up, rollouts, experience, update, evaluation, progress."""
