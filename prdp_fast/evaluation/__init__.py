"""What training changed. `held`: on fixed prompts while a run goes on. The rest is `prdp evaluate`, a model against its base:

plan (what) -> work (blocks of samples and scores, kept on disk) -> comparison (estimates) -> report (tables and pictures)
"""
