"""Reads trained LoRA adapters from the Hub or a folder, as checked and stacked factors by module.

In the order of the work: `files` finds an adapter, `weights` opens it, `schema` and `plain` say what is accepted,
`keys` names its factors, `adapter` holds all of that, `matching` finds its modules in a model, and `stacking` reads
the values. Nothing in here knows how factors are mixed.
"""
