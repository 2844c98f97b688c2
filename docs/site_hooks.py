"""What `mkdocs build` does beyond its settings: pages outside docs/ and the notebook join the site.

README.md becomes the start page, other files of the repository that a page links to keep their
path, and links are rewritten to match, so that the same Markdown works in a clone and on the site.
"""

import json
import os
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)#\s:]+)(?=[#)])")  # no address with a scheme, no anchor alone


def links(text):
    """Targets of the relative links in Markdown; those in code blocks are no links."""
    text = re.sub(r"^```.*?^```|^(?: {4}[^\n]*\n)+", "", text, flags=re.MULTILINE | re.DOTALL)
    return [target for _, target in LINK.findall(re.sub(r"`[^`]*`", "", text))]


def repository_path(page, target):
    """'docs/a.md', '../b.md' -> 'b.md'."""
    return os.path.normpath(os.path.join(os.path.dirname(page), target))


def site_path(path):
    """Where a file of the repository lies on the site."""
    if path == "README.md":
        return "index.md"
    return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))


def notebook_as_markdown(path):
    """The cells of a notebook with their stored outputs."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _outside(pages):
    """Files outside docs/ that the pages, or pages that these link to, link to."""
    found, queue = ["README.md"], ["README.md", *pages]
    while queue:
        page = queue.pop()
        if not page.endswith(".md"):
            continue
        for target in links((ROOT / page).read_text()):
            path = repository_path(page, target)
            if path not in found and (ROOT / path).is_file() and not path.startswith("docs/"):
                found.append(path)
                queue.append(path)
    return found


def on_files(files, config):
    from mkdocs.structure.files import File
    for path in _outside([f"docs/{file.src_uri}" for file in files]):
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    for file in [f for f in files if f.src_uri.endswith(".ipynb")]:
        path = f"docs/{file.src_uri}"
        files.append(File.generated(config, site_path(path),
                                    content=notebook_as_markdown(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    del config, files
    place, source = page.file.src_uri, page.file.abs_src_path
    origin = os.path.relpath(source, ROOT) if source else f"docs/{place}"

    def rewritten(match):
        path = repository_path(origin, match[2])
        if not (ROOT / path).is_file():
            return match[0]
        return match[1] + os.path.relpath(site_path(path), os.path.dirname(place) or ".")

    return LINK.sub(rewritten, markdown)
