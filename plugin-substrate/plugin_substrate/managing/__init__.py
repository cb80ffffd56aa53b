"""The verbs of `PluginManager` by topic: each module is one base class of it, with the rules of that topic."""
