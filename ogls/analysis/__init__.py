"""What people look at: round tables, the report, the token view, studies, exports, the data dictionary.

Belongs here: reading finished stages and presenting them.
Does not belong here: anything that a training needs in order to go on.
"""
