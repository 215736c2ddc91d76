"""What a run will need, in closed form, and how measurements correct it. Plain numbers: no database here.

`memory` is the closed form, `correction` what measured peaks make of it, `time` seconds from FLOPs.
"""
