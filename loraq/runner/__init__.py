"""The experiment: START with `experiment.py`, the stages in order.

`product_keys` computes the keys of products, `plan` finds the missing ones, `store` keeps them,
`session` holds the loaded pipeline, `sweep/` runs many configurations as jobs. Only `loraq.cli`
and `loraq.run` may import this package.
"""
