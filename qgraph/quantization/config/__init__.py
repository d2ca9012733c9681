"""What the user asks for, and how one decision per site comes of it.

Every way to ask is a setter; `resolve` merges their answers field by field, most specific first.
"""
