"""A reward of your own: any function from images and prompts to numbers.

deepspeed prdp_fast/train.py --config zero2.json \\
    --set 'rewards=[{name: python, options: {function: examples/custom_reward.py:red}}]'
"""


def red(images, prompts):
    """How much redder than green and blue each picture is. images: (N, 3, H, W) uint8; returns N numbers."""
    channels = images.float().mean((2, 3)) / 255
    return channels[:, 0] - channels[:, 1:].mean(1)
