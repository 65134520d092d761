#!/usr/bin/env python3
"""Makes text to train on: data/NAME/ with one plain file a document, and data/NAME/val/ with those kept for validation.

  prepare.py austen | anarchism | setmm | hol-light | linux    from a Debian package (apt-get download; no root)
  prepare.py FOLDER [--glob '*.txt']                           from the files of a folder, under the folder's name
  prepare.py pg19 | hf:OWNER/NAME[:CONFIG] [--field text] [--limit N]
                        from Hugging Face, a row a document (pip install datasets; OWNER/NAME may be a local folder of .jsonl, .parquet, .txt)

`train_gca tokenize --out PREFIX data/NAME` takes the result as it is. The same package or folder gives the same files every time.
Validation is every twentieth document in sorted order, the last one where there are fewer (austen: a whole novel), and the last
twentieth of a single one (setmm); a set with a validation split keeps that, and its other splits are left out. Files that hold a zero byte are no text and are left out, and so are empty ones.
"""
import argparse
import fnmatch
import gzip
import itertools
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib

VALIDATION = 20  # one in so many


class Failure(Exception):
  pass


def unpack(package, folder):
  """Downloads a Debian package into an empty folder and unpacks it there; returns the root of its files."""
  for tool in ("apt-get", "dpkg-deb"):
    if not shutil.which(tool):
      raise Failure(f"needs {tool}, which Debian and Ubuntu have; elsewhere give a folder of text instead")
  print(f"downloading the Debian package {package}", file=sys.stderr)
  run = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
  archives = [name for name in os.listdir(folder) if name.endswith(".deb")]
  if run.returncode or len(archives) != 1:
    errors = [line for line in run.stderr.splitlines() if line.startswith("E:")]
    raise Failure(f"apt-get could not download {package}: {' '.join(errors) or 'no file came'}; is the network up, and are its "
                  "lists there (apt-get update)? Otherwise give a folder of text")
  archive, root = os.path.join(folder, archives[0]), os.path.join(folder, "root")
  subprocess.run(["dpkg-deb", "-x", archive, root], check=True)
  os.unlink(archive)
  return root


def read(path):
  with open(path, "rb") as file:
    return file.read()


def files_below(root, pattern):
  """(path from root, content) of the regular files whose names fit the pattern; .gz files as what they hold."""
  for folder, _, names in os.walk(root):
    for name in names:
      path = os.path.join(folder, name)
      plain = name.removesuffix(".gz")
      if fnmatch.fnmatch(plain, pattern) and os.path.isfile(path) and not os.path.islink(path):
        content = read(path)
        yield os.path.relpath(os.path.join(folder, plain), root), gzip.decompress(content) if plain != name else content


def r_strings(record, where):
  """The strings of one R serialization (XDR form, version 2 or 3) that is a character vector."""

  def integer(at):
    return struct.unpack_from(">i", record, at)[0]

  if record[:2] != b"X\n" or integer(2) not in (2, 3):
    raise Failure(f"{where}: expected an R serialization of version 2 or 3 in XDR form, found {record[:6]!r}")
  at = 14
  if integer(2) == 3:  # the name of its encoding
    at += 4 + integer(at)
  if integer(at) & 255 != 16:
    raise Failure(f"{where}: expected a character vector (type 16), found type {integer(at) & 255}")
  count = integer(at + 4)
  at += 8
  strings = []
  for _ in range(count):
    length = max(integer(at + 4), 0)  # -1 is a missing string
    strings.append(record[at + 8:at + 8 + length])
    at += 8 + length
  return strings


def austen(root):
  """The novels: R's data base holds one record each, a 4-byte length of the plain bytes and a zlib stream."""
  path = os.path.join(root, "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
  data = read(path)
  at = 0
  while at < len(data):
    where = f"Rdata.rdb, record at byte {at}"
    stream = zlib.decompressobj()
    record = stream.decompress(data[at + 4:])
    if not stream.eof or len(record) != struct.unpack_from(">i", data, at)[0]:
      raise Failure(f"{where}: expected a whole zlib stream of the size before it; this version of the package is of another form")
    lines = r_strings(record, where)
    yield lines[0].decode().strip().lower().replace(" ", "_") + ".txt", b"\n".join(lines) + b"\n"
    at = len(data) - len(stream.unused_data)


def linux(root):
  """The kernel's sources but for a third of their bytes, register tables that a program wrote."""
  sources = os.path.join(root, "usr/src")
  (archive,) = [name for name in os.listdir(sources) if name.endswith(".tar.xz")]
  with tarfile.open(os.path.join(sources, archive), "r|xz") as files:
    for member in files:
      path = member.name.partition("/")[2]
      if member.isfile() and not path.startswith("drivers/gpu/drm/amd/include/"):
        yield path, files.extractfile(member).read()


DEBIAN = {  # name: (package, what to take from its files)
  "austen": ("r-cran-janeaustenr", austen),
  "anarchism": ("anarchism", lambda root: files_below(os.path.join(root, "usr/share/doc/anarchism/markdown"), "*.md")),
  "setmm": ("metamath-databases", lambda root: files_below(os.path.join(root, "usr/share/metamath/databases"), "set.mm")),
  "hol-light": ("hol-light", lambda root: files_below(os.path.join(root, "usr/share/hol-light"), "*.ml")),
  "linux": ("linux-source-6.1", linux),
}


def hugging_face(source, field, limit):
  """The rows of a set's splits train and validation, streamed: a file each, at most `limit` a split, the latter below val/."""
  try:
    import datasets
  except ImportError as error:
    raise Failure(f"needs Hugging Face's library ({error}): pip install datasets") from error
  name, _, config = source.partition(":")
  try:
    splits = datasets.load_dataset(name, config or None, streaming=True)
    for split, folder in ("train", ""), ("validation", "val/"):
      for i, row in enumerate(itertools.islice(splits.get(split, []), limit)):
        if not isinstance(row.get(field), str):
          raise Failure(f"{name}, split {split}, row {i}: expected text in the field '{field}', found the fields {', '.join(row)}; choose with --field")
        yield f"{folder}{i // 1000:05}/{i:08}.txt", row[field].encode()
  except (ValueError, RuntimeError) as error:
    raise Failure(f"{name} could not be read: {error}") from error


def write(path, content):
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path, "wb") as file:
    file.write(content)


def prepare(documents, target, has_val=False):
  """Writes the documents and, unless some of them lie in val/ already and may (has_val), moves those for validation there; the folder
  appears when all is there."""
  partial = target + ".partial"
  shutil.rmtree(partial, ignore_errors=True)
  sizes = {}
  for path, content in documents:
    if content and b"\0" not in content:
      write(os.path.join(partial, path), content)
      sizes[path] = len(content)
  if not sizes:
    raise Failure("no text was found; check the folder and --glob")
  order = sorted(sizes)
  own_val = [path for path in order if path.split(os.sep)[0] == "val"]
  if own_val and not has_val:
    raise Failure("a folder val/ is there already, where the validation documents should go; tokenize can take the folder as it is")
  if own_val:
    kept = sum(sizes[path] for path in own_val)
  elif len(order) == 1:
    path = os.path.join(partial, order[0])
    content = read(path)
    cut = content.rfind(b"\n", 0, len(content) - len(content) // VALIDATION) + 1 or len(content) - len(content) // VALIDATION
    write(path, content[:cut])
    write(os.path.join(partial, "val", order[0]), content[cut:])
    kept = len(content) - cut
  else:
    chosen = order[VALIDATION - 1::VALIDATION] or order[-1:]
    for path in chosen:
      os.makedirs(os.path.dirname(os.path.join(partial, "val", path)), exist_ok=True)
      os.rename(os.path.join(partial, path), os.path.join(partial, "val", path))
    kept = sum(sizes[path] for path in chosen)
  os.rename(partial, target)
  total = sum(sizes.values())
  print(f"{target}: {len(order)} documents, {total / 1e6:.1f} MB, of which {kept / 1e6:.2f} MB for validation")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("source", help="one of " + ", ".join(DEBIAN) + ", pg19, hf:OWNER/NAME[:CONFIG], or a folder")
  parser.add_argument("--glob", default="*", help="which files of the folder (default: all)")
  parser.add_argument("--field", default="text", help="which field of a row is the text (default: text)")
  parser.add_argument("--limit", type=int, help="rows to take of each split (default: all)")
  parser.add_argument("--out", default=os.path.join(os.path.dirname(__file__), "../../data"), help="where NAME/ is made (default: data/)")
  options = parser.parse_args()
  hub = {"pg19": "emozilla/pg19"}.get(options.source) or (options.source[3:] if options.source.startswith("hf:") else None)
  name = options.source if options.source in (*DEBIAN, "pg19") else os.path.basename(os.path.abspath(hub.replace(":", "_") if hub else options.source))
  target = os.path.normpath(os.path.join(options.out, name))
  try:
    if os.path.exists(target):
      raise Failure(f"{target} is there already: remove it to make it again, or choose another --out")
    if hub:
      prepare(hugging_face(hub, options.field, options.limit), target, has_val=True)
    elif options.source not in DEBIAN:
      if not os.path.isdir(options.source):
        raise Failure(f"'{options.source}' is neither a folder nor one of {', '.join(DEBIAN)}, pg19, hf:OWNER/NAME")
      prepare(files_below(options.source, options.glob), target)
    else:
      package, take = DEBIAN[options.source]
      with tempfile.TemporaryDirectory() as folder:
        prepare(take(unpack(package, folder)), target)
  except (Failure, OSError, EOFError, struct.error, zlib.error, subprocess.CalledProcessError, tarfile.TarError) as error:
    shutil.rmtree(target + ".partial", ignore_errors=True)
    sys.exit(f"prepare.py: {error}")


main()
