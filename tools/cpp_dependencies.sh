#!/bin/sh
# cpp_dependencies.sh PYTHON DEST
# What cpp/ is built with, on a Debian that packages no ONNX Runtime; no system change, and nothing to do where it is done.
#   DEST/include   headers of ONNX Runtime (Debian trixie's; its C API is stable, so newer libraries fit) and nlohmann's JSON
#   DEST/lib       libonnxruntime.so -> the library inside PYTHON's own onnxruntime package: engines belong to its version
# Takes the mirror that apt already uses. Elsewhere: ONNX Runtime's own release archive, and the JSON parser's one header.
set -e
PY=$1; mkdir -p "$2/lib"; D=$(cd "$2" && pwd)
if [ ! -e "$D/include/nlohmann/json.hpp" ]; then
  mkdir -p "$D/apt/lists/partial" "$D/apt/cache/archives/partial" "$D/apt/none"
  URI=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources 2>/dev/null |
    sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\) .*/\2/p' | head -1)
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $URI trixie main" > "$D/apt/sources.list"
  cat > "$D/apt/apt.conf" <<C
Dir::State::Lists "$D/apt/lists"; Dir::Cache "$D/apt/cache"; Dir::Etc::SourceList "$D/apt/sources.list";
Dir::Etc::SourceParts "$D/apt/none"; Dir::Etc::PreferencesParts "$D/apt/none"; APT::Sandbox::User "root";
C
  (
    cd "$D/apt"
    APT_CONFIG="$D/apt/apt.conf"; export APT_CONFIG
    apt-get -qq update
    apt-get -qq download libonnxruntime-dev nlohmann-json3-dev
    for package in ./*.deb; do dpkg -x "$package" "$D/deb"; done
  )
  rm -rf "$D/include"
  cp -r "$D/deb/usr/include/onnxruntime" "$D/include"
  mv "$D/deb/usr/include/nlohmann" "$D/include/nlohmann"  # last: it marks what is complete
  rm -rf "$D/apt" "$D/deb"
fi
SO=$("$PY" -c 'import importlib.util, pathlib
print(sorted((pathlib.Path(importlib.util.find_spec("onnxruntime").origin).parent / "capi").glob("libonnxruntime.so*"))[-1])')
ln -sfn "$SO" "$D/lib/libonnxruntime.so.1"
ln -sfn libonnxruntime.so.1 "$D/lib/libonnxruntime.so"
