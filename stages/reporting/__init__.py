"""What the report is made of, apart from the kit, so that a new chart retrains nothing.

results.py reads the finished jobs. stats.py computes, claims.py says what may be said of it, and
lineage.py counts costs. charts.py, colours.py, pictures.py and formats.py draw and write. page.py
brings all of it together for the templates.
"""
