// Times several builds of libfastff in turn on one case, for judging a change to the kernels.
//
//   c++ -O2 -std=c++17 -I csrc benchmarks/compare_builds.cpp -o compare_builds -ldl
//   ./compare_builds old.so new.so -- trees=32 depth=6 rows=128
//
// Options after --: features, trees, depth, leaf_width, node_output, activation, gate, rows, layers (packed separately and
// used in turn), weights (0 fp32, 1 bf16, 2 int8), threads, seconds. Prints for each build the median and the quartiles of
// microseconds a row. Builds take turns of about two milliseconds, so that slow phases of the machine hit all alike.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "fastff.h"

namespace {

struct Build {
  std::string path;
  decltype(&fastff_pack_f32) pack;
  decltype(&fastff_infer_f32) infer;
  std::vector<fastff_packed*> layers;
  std::vector<double> us;
};

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "compare_builds: %s\n", message.c_str());
  std::exit(2);
}

Build load(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) fail(dlerror());
  auto version = reinterpret_cast<decltype(&fastff_abi_version)>(dlsym(library, "fastff_abi_version"));
  if (!version || version() != FASTFF_ABI_VERSION) fail(std::string(path) + " has another ABI version than fastff.h");
  return {path, reinterpret_cast<decltype(&fastff_pack_f32)>(dlsym(library, "fastff_pack_f32")),
          reinterpret_cast<decltype(&fastff_infer_f32)>(dlsym(library, "fastff_infer_f32")), {}, {}};
}

std::vector<float> normal(int64_t n, double scale, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution(0, static_cast<float>(scale));
  std::vector<float> pool(1 << 20), values(n);
  for (float& v : pool) v = distribution(generator);
  for (int64_t i = 0; i < n; ++i) values[i] = pool[(i * 2654435761u >> 9) & (pool.size() - 1)];
  return values;
}

double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, double> option = {{"features", 768}, {"trees", 1},   {"depth", 11}, {"leaf_width", 1},
                                          {"node_output", 1}, {"activation", 0}, {"gate", 0},   {"rows", 1},
                                          {"layers", 1},     {"weights", 0}, {"threads", 1}, {"seconds", 1}};
  std::vector<Build> builds;
  int at = 1;
  for (; at < argc && std::strcmp(argv[at], "--") != 0; ++at) builds.push_back(load(argv[at]));
  for (++at; at < argc; ++at) {
    const std::string text = argv[at];
    const auto equals = text.find('=');
    if (equals == std::string::npos || !option.count(text.substr(0, equals))) fail("unknown option " + text);
    option[text.substr(0, equals)] = std::atof(text.c_str() + equals + 1);
  }
  if (builds.empty()) fail("name at least one library");

  const auto size = [&](const char* name) { return static_cast<int64_t>(option[name]); };
  const int64_t d = size("features"), rows = size("rows"), leaves = int64_t{1} << size("depth");
  const fastff_tree tree = {d, d, size("trees"), size("leaf_width"), static_cast<int32_t>(size("depth")),
                            static_cast<int32_t>(size("node_output")), static_cast<int32_t>(size("activation")),
                            static_cast<int32_t>(size("gate")), 0.5};
  const int64_t pair = tree.activation == FASTFF_SWIGLU ? 2 : 1;
  const std::vector<float> w_in = normal(tree.trees * (leaves - 1 + leaves * tree.leaf_width * pair) * d, 1 / std::sqrt(d), 1);
  const std::vector<float> w_out =
      normal(tree.trees * ((tree.node_output ? leaves - 1 : 0) + leaves * tree.leaf_width) * d, 1, 2);
  const int64_t pool = std::max<int64_t>(rows, 4096 / rows * rows);
  const std::vector<float> x = normal(pool * d, 1, 3);
  std::vector<float> y(rows * d);
  for (Build& build : builds)
    for (int64_t i = 0; i < size("layers"); ++i) {
      build.layers.push_back(nullptr);
      if (build.pack(&tree, w_in.data(), nullptr, w_out.data(), nullptr, static_cast<int32_t>(size("weights")),
                     &build.layers.back()) != FASTFF_OK)
        fail(build.path + " cannot pack this layer");
    }

  int64_t from = 0;
  const int64_t calls = std::max<int64_t>(size("layers"), 500 / rows);
  const auto sample = [&](Build& build) {
    const double start = now_us();
    for (int64_t i = 0; i < calls; ++i) {
      build.infer(build.layers[i % build.layers.size()], x.data() + from * d, y.data(), rows, size("threads"));
      from = from + 2 * rows <= pool ? from + rows : 0;
    }
    return (now_us() - start) / static_cast<double>(calls * rows);
  };
  for (Build& build : builds) sample(build);
  for (const double end = now_us() + option["seconds"] * 1e6 * static_cast<double>(builds.size()); now_us() < end;)
    for (Build& build : builds) build.us.push_back(sample(build));
  for (Build& build : builds) {
    std::sort(build.us.begin(), build.us.end());
    const size_t n = build.us.size();
    std::printf("%-40s %8.3f us a row (%.3f to %.3f)\n", build.path.c_str(), build.us[n / 2], build.us[n / 4], build.us[3 * n / 4]);
  }
}
