"""The whole loop, one module per stage.

    policy ─► prompt_draws ─► generations ─► feedback ─► datapool ─► checkpoint ─► evaluation
       ▲                                                                 │
       └──────────────── policy of the next iteration ◄──────────────────┘

Every asset has one partition per experiment and iteration, and depends on the one before it in the
same partition. The arrow back is not declared (Dagster does not allow cycles): ``checkpoint`` reports
the next iteration's ``policy``, an external asset (:mod:`assets.policy`). What the stages share is in
:mod:`assets.stage`; what their output depends on is in :mod:`textalign_dagster.loop.stages`.
"""
