"""What a run leaves: its directory, metrics, rollout dumps, plots, a report and the terminal display.

Host code, free of jax. Only process 0 of a run writes or prints.

    rundir.py      runs/<name>/, config.json, what may change on resume
    metrics.py     metrics.jsonl and its TensorBoard mirror, exact across kills
    rollouts.py    rollouts/<step>.jsonl
    summary.py     summary.json: held-out accuracy before and after, with intervals
    fitting.py     what a step needs on a slice, and whether it fits
    console.py     progress and warnings while it runs; closing.py prints the summary
    panels.py      which metrics go on which plot, as data
    entropy_law.py fits of reward on entropy, and of entropy's fall on covariance
    plots.py       drawing them; html.py puts them in report.html
"""
