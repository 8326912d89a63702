"""
`python -m lplb simulate`: what exact dispatch is worth on recorded routing.

    trace.py      reads a trace and cuts it into a history and micro-batches
    options.py    what was asked for, checked; topology or EPLB placement
    cost.py       what is counted: tokens, units, active experts, time on ranks of different speed
    engine.py     plans of all ranks through the library, as a training job would make them
    policies.py   the other ways to choose a replica, in numpy
    play.py       plays every micro-batch of every layer through every policy
    report.py     the table, the sentence and the JSON
    plot.py       the picture
    compare.py    topologies and placements beside each other, and a recommendation
    torch_file.py traces that torch.save wrote
"""
