"""Presentation of results: round tables, the report, the token view, studies, exports, the data dictionary.

Belongs here: reading finished stages and presenting them.
Does not belong here: anything that training needs.
"""
