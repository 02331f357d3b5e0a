def documents(*a, **k): pass
