"""The loop, one module a stage; this is all of it.

    policy ─► prompt_draws ─► generations ─► feedback ─► datapool ─► checkpoint ─► evaluation
       ▲                                                                 │
       └──────────────── policy of the next iteration ◄──────────────────┘

Every asset has one partition per experiment and iteration, and depends on the one before it in the
same partition. The arrow back is not declared (Dagster refuses cycles): ``checkpoint`` reports the
next iteration's ``policy``, an external asset (:mod:`assets.policy`). What every stage has at hand
is in :mod:`assets.stage`; what its output depends on in :mod:`textalign_dagster.loop.stages`.
"""
