"""Attention kernels behind one signature (`interface.py`); `select.py` chooses one."""
