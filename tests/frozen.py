"""Imported last by the server that tests fork from: what it has loaded is never garbage.

Forks that looked through it all would write to each page of it, and so copy it.
"""

import gc

gc.collect()
gc.freeze()
