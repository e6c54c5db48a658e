"""A rollout made into an experience in one call, as PPO's loop does it in two."""

from pipeline.config.stages import PPO
from pipeline.core.tensors import Reduce
from pipeline.rl.experience import Experience, Forward, ScoreFunction, make_experience, score_rollout
from pipeline.rl.rollout import Rollout


def to_experience(
    rollout: Rollout, actor_critic: Forward, reference: Forward, score: ScoreFunction, config: PPO, reduce: Reduce
) -> Experience:
    scored = score_rollout(rollout, actor_critic, reference, score, config.micro_batch)
    return make_experience(rollout, scored, config, config.kl_coef, reduce)
