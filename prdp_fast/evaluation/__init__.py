"""What training changed, on the same prompts and the same noise before and after.

While a run goes on, `run.evaluate` scores its denoiser. Afterwards `prdp evaluate` compares a model with its base:

request (what is asked) -> plan (what that means) -> run (samples and scores) -> blocks (kept on disk) -> measure (numbers)
"""
