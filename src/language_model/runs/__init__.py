"""One run, from its settings to its folder on disk.

`config.entry_point`, `check_config` and `build` are the use of Hydra; `plan.make_plan` decides everything before the
first step, `fit.fit` carries the plan out; `folder` reads and writes what a run leaves; `resume` says what may change
when a run resumes; `load.load_run` loads a trained run; `announce` logs its start and its end.
"""
