"""Many runs.

`grid.grid` and `search.search` are the two sweepers (``hydra_plugins/language_model.py`` registers them with Hydra),
`job.run_job` does one job in a process of its own, `summary` reads the outcomes, `compare.compare_settings` gives
verdicts over seeds, `exercises` the chapter's tables and plots.
"""
