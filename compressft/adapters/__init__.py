"""Adapter folders: our own, PEFT's and AdapterHub's, each read onto a base and written from what stands on one."""
