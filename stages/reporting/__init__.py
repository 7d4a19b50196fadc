"""What the report is made of: statistics, figures, templates. Apart from the kit, so that a new
chart retrains nothing.
"""
