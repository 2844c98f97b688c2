"""gcp-storage-emulator with what clients need of the real service and the package leaves out: the
generation in the headers of a download, requests on condition of a generation, and a multipart
upload's last byte where that is \\r.

    python storage_emulator.py PORT BUCKET
"""

import json
import sys
import threading
import time
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

LOCK = threading.RLock()


def generation(storage, bucket, name):
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def conditional(function):
    def handler(request, response, storage, *args, **kwargs):
        bucket = request.params["bucket_name"]
        name = request.params.get("object_id") or request.query.get("name", [""])[0]
        with LOCK:
            now = generation(storage, bucket, name)
            if request.query.get("ifGenerationMatch", [now])[0] != now:
                response.status = HTTPStatus.PRECONDITION_FAILED
            elif now != "0" and request.query.get("ifGenerationNotMatch", [""])[0] == now:
                response.status = HTTPStatus.NOT_MODIFIED
            else:
                if request.method == "GET" and now != "0":
                    response["x-goog-generation"] = now
                function(request, response, storage, *args, **kwargs)
    return handler


def whole_uploads(read):
    """The package's own reader takes the parts for lines of a mail."""
    def read_data(handler, query):
        if handler.headers.get_content_type() != "multipart/related":
            return read(handler, query)
        mark = b"--" + handler.headers.get_boundary().encode()
        _, meta, rest = server._read_raw_data(handler).split(mark, 2)
        line = meta[:meta.index(b"\n") + 1]  # gcsfs ends lines with \n
        kind, content = rest[:rest.rindex(line + mark)].split(line * 2, 1)
        return {"meta": json.loads(meta.split(line * 2, 1)[1]), "content": content,
                "content-type": kind.partition(b":")[2].strip().decode()}
    return read_data


if __name__ == "__main__":
    server._read_data = whole_uploads(server._read_data)
    conditions = {f: conditional(f) for f in (objects.insert, objects.get, objects.download,
                                              objects.delete)}
    server.HANDLERS = tuple(
        (regex, {method: conditions.get(f, f) for method, f in row.items()})
        for regex, row in server.HANDLERS)
    with server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True,
                              default_bucket=sys.argv[2]):
        print("ready", flush=True)
        while True:
            time.sleep(1)
