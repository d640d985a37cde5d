"""Pictures found by words and by pictures: exact search over embeddings, a page of hits, and a page that is served.

``nearest`` finds rows by their vectors, ``opening`` makes an ``index`` of pictures, ``searcher`` asks it by a model,
``hits`` writes what was found, ``routes`` and ``server`` serve the files of ``page``.
"""
