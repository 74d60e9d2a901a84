"""Chaos: small real runs that are stopped, killed and moved at chosen and random moments, and must lose nothing.

`python -m tests.chaos --help`. What is in which module:

    plan       what will be done to which run: a pure function of the seed
    places     where a rank can be caught: the hooks that hold it there
    ranks      the processes of one start, and signals to them
    trouble    what befalls a start besides signals: storage, lost folders, damaged files, ranks that differ
    show       one start: strikes it, waits for its end
    play       one run from its first start to its last, checked after each
    cluster    the same for runs under a real Slurm
    story      whether events.jsonl, the exit statuses and the folder tell the same story
    verdict    the facts about a finished run that must be those of an undisturbed one
    report     the table at the end
"""
