"""Serving: the registry that engines read, two small plug-ins inside vLLM, and the launcher and client around it.

Importing this package loads neither torch nor vllm; `vllm_plugin` touches vLLM only when vLLM itself calls it.
"""
