"""``cosmos-ssl search``: pictures found by words or by pictures; a page of hits, or a page that is served."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cosmos_ssl.cli.common import table
from cosmos_ssl.cli.progress import stages
from cosmos_ssl.cli.weights import add_batches, add_checkpoint, positive, reading
from cosmos_ssl.errors import EXIT_DONE, UserError, printable
from cosmos_ssl.files import folder_fault, storage_faults

_PORT, _MOST = 8321, 1000
_PRINTED, _SHOWN = 5, 80  # hits of a query that are printed, and letters of a text


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "search",
        help="pictures found by words or by pictures, as a page, as JSON, or served to a browser",
        description="The pictures whose embeddings are nearest to words or to a picture, of all that there are. What "
        "is not embedded yet is, once for a model's weights and data: into search/ of the cache "
        "($XDG_CACHE_HOME/cosmos_ssl, by default ~/.cache/cosmos_ssl), which may be removed. The same command again "
        "continues what was interrupted.",
    )
    add_checkpoint(parser)
    data = "a folder of pictures, picture files, shards (braces, *, ::), or a file (or its folder) of cosmos-ssl embed"
    parser.add_argument("--data", nargs="+", required=True, metavar="DATA", help=data)
    of_embeddings = "the pictures that a file of embeddings was made of (default: those that it names)"
    parser.add_argument("--pictures", nargs="+", metavar="DATA", help=of_embeddings)
    parser.add_argument(
        "--text",
        dest="words",
        action="append",
        default=[],
        metavar="T",
        help="what to look for; repeat the flag for several",
    )
    parser.add_argument("--image", dest="images", nargs="+", default=[], type=Path, metavar="I", help="picture files")
    parser.add_argument("--top", type=_top, default=50, metavar="N", help="hits of each query (default: %(default)s)")
    parser.add_argument(
        "--output",
        default=Path("hits"),
        type=Path,
        metavar="DIR",
        help="where index.html and hits.json go (default: %(default)s)",
    )
    texts = "captions of the pictures: txt, or a field of the JSON (default: txt, or the first that is there)"
    parser.add_argument("--texts", metavar="FIELD", help=texts)
    serve = "serve a page to search from, to browsers of this machine alone (default port: %(const)s; 0: any free one)"
    parser.add_argument("--serve", nargs="?", type=_port, const=_PORT, metavar="PORT", help=serve)
    engine = "plain: products of matrices; faiss: the same answers by cosmos-ssl[search] (default: %(default)s)"
    parser.add_argument("--engine", choices=("plain", "faiss"), default="plain", help=engine)
    add_batches(parser)
    parser.set_defaults(run=_search)


def _top(text: str) -> int:
    if (number := positive(text)) > _MOST:
        raise argparse.ArgumentTypeError(f"{text} is more than {_MOST:,}")
    return number


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text} is no port from 0 to 65535")
    return int(text)


def _search(arguments: argparse.Namespace) -> int:
    if not arguments.words and not arguments.images and arguments.serve is None:
        raise UserError("--text, --image or --serve: say what to look for, such as --text 'a red heart'")
    if not all(text.strip() for text in arguments.words):
        raise UserError("--text: an empty text finds nothing. Say what to look for, such as --text 'a red heart'")
    listener = None  # it and the folder are looked at before minutes are spent on embedding
    if arguments.words or arguments.images:
        what = f"--output {arguments.output}: cannot be written"
        with storage_faults(what):
            if (fault := folder_fault(arguments.output)) is not None:
                raise UserError(f"{what}: {fault}")
    if arguments.serve is not None:
        from cosmos_ssl.search.server import listen

        listener = listen(arguments.serve)
    try:
        return _answer(arguments, listener)
    finally:
        if listener is not None:
            listener.close()


def _answer(arguments: argparse.Namespace, listener: Any) -> int:
    from cosmos_ssl.build.reading import open_model
    from cosmos_ssl.evaluation.attending import opened_pictures
    from cosmos_ssl.pictures import to_rgb
    from cosmos_ssl.search.hits import Answer, write_hits
    from cosmos_ssl.search.opening import Opening, open_index
    from cosmos_ssl.search.searcher import Searcher

    opened = opened_pictures(arguments.images)
    options = {name: getattr(arguments, name) for name in ("device", "overrides", "trust_code")}
    with reading(), stages() as progress:
        encoder, checkpoint = open_model(arguments.checkpoint, arguments.which, **options)
        if arguments.words and "text" not in encoder.model.towers:
            raise UserError("--text: this model has no text tower. Search by a picture: --image, or --serve")
        opening = Opening(
            engine=arguments.engine,
            texts=arguments.texts,
            with_texts=listener is not None,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            overrides=arguments.overrides,
            progress=progress,
        )
        index = open_index(encoder, arguments.data, opening, pictures=arguments.pictures)
    searcher = Searcher(encoder, index)
    model = f"{checkpoint}, {arguments.which}"
    answers = [
        Answer(query=text, hits=searcher.nearest(searcher.words_vector(text), arguments.top))
        for text in arguments.words
    ]
    for name, image in opened:
        picture = to_rgb(image, searcher.background)
        hits = searcher.nearest(searcher.picture_vector(picture), arguments.top)
        answers.append(Answer(query=name, hits=hits, picture=picture))
    if answers:
        subtitle = f"{model}; {len(index):,} pictures of {' '.join(arguments.data)}"
        rows = write_hits(searcher, answers, arguments.output, subtitle=subtitle)
        for answer, own in zip(answers, rows, strict=True):
            _print(answer.query, own)
        print(arguments.output / "index.html")
    if listener is not None:
        _serve(listener, searcher, model, " ".join(arguments.data), arguments.top)
    return EXIT_DONE


def _print(query: str, rows: list[dict[str, Any]]) -> None:
    """The first hits of a query."""
    first = [
        [f"{row['rank']}", f"{row['score']:.3f}", row["key"], (row["caption"] or "")[:_SHOWN]]
        for row in rows[:_PRINTED]
    ]
    print(printable(query[:_SHOWN]))
    print(table([["", "SCORE", "KEY", "CAPTION"], *first], indent="  "))


def _serve(listener: Any, searcher: Any, model: str, data: str, top: int) -> None:
    """Serve until Ctrl-C."""
    from cosmos_ssl.search.routes import About, Routes
    from cosmos_ssl.search.server import Server

    server = Server(listener, Routes(searcher, About(model=model, data=data, top=top)))
    print(f"{server.address} (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)
    finally:
        server.server_close()
