"""The paper's four claims, tested on two CPU cores: images, speech, translation, language.

``protocol.py`` says what is run; read it first. ``python -m benchmarks.tasks`` runs it.
"""
