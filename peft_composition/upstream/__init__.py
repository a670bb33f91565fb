"""Reads: trained LoRA adapters, from the Hub or a folder, as checked and stacked factors by module.

In the order of the work: `files` finds them, `weights` opens them, `schema` and `plain` say what is admitted, `keys`
names the factors, `adapter` is one adapter with all of that, `matching` finds its modules in a model, `stacking` reads
the values. Nothing in here knows how factors are mixed.
"""
