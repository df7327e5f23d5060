"""`mmclip data build READER`: a data set as downloaded -> a data folder.

Each reader is a command, made when it is asked for: its help shows the options that it takes, and
`mmclip data build` alone lists the readers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperOption
from typer.main import get_command

from mmclip.cli.plain import IN_OUT, OTHER, PlainCommand, PlainGroup
from mmclip.cli.shared import command_line, resume_hint
from mmclip.cli.tables import print_table
from mmclip.progress import console

if TYPE_CHECKING:
    from mmclip.config import ResizeMode
    from mmclip.data.ingest.sources import DicomOptions

IMAGES_TEXTS = "Images and texts"
PRIVACY = "Privacy"
SPLITS = "Splits, where the data set has none"
WORK = "Who does the work"

OF_READER = {
    "mapping": ("csv", "dicom"),
    "table": ("csv",),
    "reports": ("dicom",),
    "id_key": ("dicom",),
    "keep_age_sex": ("dicom",),
    "reader": ("own",),
}
"""The options that some readers take alone. The help of the others leaves them out; given all the
same, they are refused by the reader, which says why."""

EXAMPLES = {
    "csv": "--root raw/ --mapping raw.toml --image-size 64 --out data/a",
    "own": "--reader my_readers:read_hospital --root raw/ --out data/own",
    "dicom": "--root PACS/ --reports reports.csv --mapping reports.toml --out data/hospital",
}
"""Behind the name of a reader; of the others the root alone differs."""


def _option(panel: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **settings)


Root = Annotated[
    Path, _option(IN_OUT, "--root", help="The data set, as downloaded.", metavar="PATH")
]
Out = Annotated[Path, _option(IN_OUT, help="Data folder to write.", metavar="PATH")]
Mapping = Annotated[
    Path | None,
    _option(IN_OUT, help="TOML file that says what the columns of the table mean.", metavar="PATH"),
]
TablePath = Annotated[
    Path | None, _option(IN_OUT, help="Table to read in place of the mapping's.", metavar="PATH")
]
Reports = Annotated[
    Path | None,
    _option(IN_OUT, help="Table of reports, in place of the mapping's.", metavar="PATH"),
]
Reader = Annotated[
    str | None,
    _option(
        IN_OUT, "--reader", help="module:name of a function or class of yours.", metavar="NAME"
    ),
]
ImageSize = Annotated[
    int,
    _option(IMAGES_TEXTS, help="Side of the cached images, in pixels.", min=8, metavar="N"),
]
Resize = Annotated[
    str,
    _option(IMAGES_TEXTS, help="How images become squares: squash, pad or crop.", metavar="NAME"),
]
Entities = Annotated[
    str,
    _option(
        IMAGES_TEXTS,
        help="Finds entities in reports: lexicon, spacy:NAME or hf:NAME.",
        metavar="NAME",
    ),
]
IdKey = Annotated[
    Path | None,
    _option(PRIVACY, help="Key that hashes ids; made if absent. [OUT.id-key]", metavar="PATH"),
]
KeepAgeSex = Annotated[
    bool, _option(PRIVACY, "--keep-age-sex", help="Keep age and sex of patients.")
]
Seed = Annotated[int, _option(SPLITS, help="Seed of the random split.", metavar="N")]
ValRatio = Annotated[float, _option(SPLITS, help="Share of the patients for val.", metavar="RATIO")]
TestRatio = Annotated[
    float, _option(SPLITS, help="Share of the patients for test.", metavar="RATIO")
]
Workers = Annotated[
    int, _option(WORK, help="Number of processes; 0 takes all cores.", min=0, metavar="N")
]
Scheduler = Annotated[
    str | None,
    _option(WORK, help="Dask scheduler whose workers build: tcp://host:port.", metavar="ADDRESS"),
]
ShardOf = Annotated[
    str | None,
    _option(WORK, help="Build one share, such as 3/8; run without it to join.", metavar="I/N"),
]
Overwrite = Annotated[bool, _option(OTHER, "--overwrite", help="Replace a finished build.")]


@dataclass(frozen=True)
class ReaderCommand:
    """The command of a reader."""

    name: str

    def build(
        self,
        root_: Root,
        out: Out,
        mapping: Mapping = None,
        table: TablePath = None,
        reports: Reports = None,
        reader: Reader = None,
        image_size: ImageSize = 224,
        resize: Resize = "squash",
        entities: Entities = "lexicon",
        id_key: IdKey = None,
        keep_age_sex: KeepAgeSex = False,
        seed: Seed = 0,
        val_ratio: ValRatio = 0.1,
        test_ratio: TestRatio = 0.1,
        workers: Workers = 0,
        scheduler: Scheduler = None,
        shard: ShardOf = None,
        overwrite: Overwrite = False,
    ) -> None:
        """Builds a data folder from what the reader reads."""
        from mmclip.data.ingest.build import BuildOptions, build_data, build_shard
        from mmclip.data.ingest.shards import Shard
        from mmclip.data.ingest.sources import open_reader
        from mmclip.data.sample import RandomSplit

        options = BuildOptions(
            resize=_resize_mode(resize),
            entities=entities,
            split=RandomSplit(seed, val_ratio, test_ratio),
            hides_paths=self.name == "dicom",
            metadata={"reader": reader or self.name, "command": command_line()},
        )
        dicom = _dicom_options(self.name, out, reports, id_key, keep_age_sex)
        who = _who_works(scheduler, workers)
        share = None if shard is None else Shard.parse(shard)
        if share is not None and overwrite:
            raise ValueError(
                f"a shard never replaces a build; leave --overwrite out, and remove {out} first if "
                f"it holds an old one"
            )
        records = open_reader(
            self.name, root_, mapping=mapping, table=table, dicom=dicom, own=reader
        )
        with resume_hint():
            if share is not None:
                build_shard(
                    records, root_, out, share,
                    image_size=image_size, workers=who, options=options,
                )  # fmt: skip
                said = f"shard {shard} is done; when all are, run the same command without --shard"
                console.print(said, markup=False, soft_wrap=True)
                return
            meta = build_data(
                records, root_, out,
                image_size=image_size, workers=who, overwrite=overwrite, options=options,
            )  # fmt: skip
        _print_meta(meta, out)


class ReaderGroup(PlainGroup):
    """The readers as commands; data sets and their libraries are loaded when one is named."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of the readers."""
        from mmclip.data.ingest.sources import READERS

        return list(READERS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a reader.

        Raises:
            SourceError: When there is none of that name.
        """
        from mmclip.data.ingest.sources import check_reader

        check_reader(cmd_name)
        return _command_of(cmd_name)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What stands behind the name of the group in its usage."""
        return ["READER [OPTIONS]"]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Says that the reader comes first where an option does; `--reader` alone means own."""
        if args and args[0].partition("=")[0] == "--reader":
            args = ["own", *args]
        if args and args[0].startswith("-") and args[0] != "--help":
            raise ValueError(
                f"{args[0]} stands before the reader; write `mmclip data build READER {args[0]}`, "
                f"with a READER of `mmclip data build --help`"
            )
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=ReaderGroup,
    help="Reads a data set and writes a checked, hashed data folder with images resized once.",
    no_args_is_help=True,
)


def _command_of(name: str) -> Any:
    from mmclip.data.ingest.sources import READERS

    example = EXAMPLES.get(name, f"--root downloads/{name}/ --out data/{name}")
    said = (
        f"{READERS[name]}\n\nWrites a checked, hashed data folder with images resized once.\n\n"
        f"Example: `mmclip data build {name} {example}`"
    )
    one = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    one.command(name, cls=PlainCommand, help=said, short_help=READERS[name])(
        ReaderCommand(name).build
    )
    command = get_command(one)
    for param in command.params:
        if isinstance(param, TyperOption):
            param.hidden = name not in OF_READER.get(str(param.name), (name,))
    return command


def _dicom_options(
    name: str, out: Path, reports: Path | None, id_key: Path | None, keep_age_sex: bool
) -> "DicomOptions | None":
    """What the reader dicom needs; of another reader None, or what it will refuse."""
    from mmclip.data.ingest.sources import DicomOptions

    if name != "dicom" and reports is None and id_key is None and not keep_age_sex:
        return None
    key = id_key or out.with_name(f"{out.resolve().name}.id-key")
    return DicomOptions(key, reports, keep_age_sex)


def _who_works(scheduler: str | None, workers: int) -> str | int:
    """A Dask scheduler, or a number of processes; all cores where neither is given."""
    from mmclip.data.ingest.shards import n_cores

    if scheduler is not None and workers:
        both = f"--workers {workers} and --scheduler {scheduler}"
        raise ValueError(f"{both} both say who works; give one of them")
    return scheduler or workers or n_cores()


def _resize_mode(name: str) -> "ResizeMode":
    from mmclip.config import ResizeMode

    for known in get_args(ResizeMode):
        if name == known:
            return known
    raise ValueError(f"--resize {name!r} is none of {', '.join(get_args(ResizeMode))}")


def _print_meta(meta: dict, out: Path) -> None:
    rows = [
        ("rows read", meta["n_rows"]),
        ("kept", meta["n_samples"]),
        ("  with an image", meta["n_with_image"]),
        ("  with a report", meta["n_with_report"]),
        ("  with both", meta["n_paired"]),
        ("excluded", meta["n_excluded"]),
        *((f"  {reason}", n) for reason, n in meta["excluded"].items()),
        ("studies", meta["n_studies"]),
        ("patients", meta["n_patients"]),
        *((f"split {name}", n) for name, n in meta["splits"].items()),
    ]
    styles = ["yellow" if what == "excluded" and n else "" for what, n in rows]
    print_table(("", ""), [(what, f"{n:,}") for what, n in rows], styles)
    if meta["n_excluded"]:
        said = f"{meta['n_excluded']:,} of {meta['n_rows']:,} rows are excluded; which and why: "
        console.print(
            f"{said}{out / 'excluded.jsonl'}", style="yellow", markup=False, soft_wrap=True
        )
    console.print(f"data hash {meta['data_hash'][:16]}")
    print(out)
