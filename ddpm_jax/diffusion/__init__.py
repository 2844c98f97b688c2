"""The paper's equations on plain arrays: no files, config, modules, keys or devices in here."""
