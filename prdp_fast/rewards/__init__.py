"""Black-box rewards. Each one's module is imported when a recipe names it."""

from prdp_fast.core.errors import RewardError
from prdp_fast.rewards.background import BackgroundScores
from prdp_fast.rewards.base import Reward, RewardOutput
from prdp_fast.rewards.registry import REWARDS, WeightedRewards, build_reward, build_rewards

__all__ = [
    "REWARDS",
    "BackgroundScores",
    "Reward",
    "RewardError",
    "RewardOutput",
    "WeightedRewards",
    "build_reward",
    "build_rewards",
]
