"""Proofs: that facts are recalled verbatim (`recall`) and that the rest answers as before (`locality`)."""
