// Loads the plugin library as TensorRT does and asks it what a builder and a runtime ask.
// usage: conformance PLUGIN [REGISTRY [alone]]; REGISTRY: a libnvinfer whose own registry loads
// PLUGIN, or, with a third word, into whose registry PLUGIN enters its creators by itself.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;

static int checks = 0, failures = 0;
static std::string where;
#define CHECK(condition)                                                            \
  do {                                                                              \
    ++checks;                                                                       \
    if (!(condition)) ++failures, std::printf("%s: %s\n", where.c_str(), #condition); \
  } while (0)

struct Log final : ILogger {
  std::string last;
  void log(Severity, char const* message) noexcept override { last = message; }
} static logger;
struct Finder final : ILoggerFinder {
  ILogger* findLogger() noexcept(NV_TENSORRT_MAJOR >= 10) override { return &logger; }
} static finder;

// A dimension that can be recognised; TensorRT's own are as opaque.
struct Expression final : IDimensionExpr {
#if NV_TENSORRT_MAJOR < 10
  Expression() { mImpl = nullptr; }
#endif
  ~Expression() noexcept override = default;
};
#if NV_TENSORRT_MAJOR >= 10
struct Builder final : IExprBuilder {
  ~Builder() noexcept override = default;
};
#else
struct Builder final : IExprBuilder {
  ~Builder() noexcept override = default;
};
#endif

static Dims dims(std::vector<int> const& sizes) {
  Dims d{};
  d.nbDims = static_cast<int>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) d.d[i] = sizes[i];
  return d;
}

struct Operator {
  char const* name;
  std::vector<std::vector<int>> inputs;           // B 2, N 100, C 64, T 20, H 4, D 48
  std::vector<std::vector<std::pair<int, int>>> outputs;  // (input, axis) of each dimension
  int words;
};
static std::vector<Operator> const operators{
    {"CrossAttention", {{2, 100, 64}, {2, 64, 4, 20}, {2, 4, 20, 48}, {2, 20}, {2, 4, 20}},
     {{{0, 0}, {0, 1}, {2, 3}}}, 3},
    {"NormAttention", {{2, 64, 100}, {2, 20, 64}, {2, 64, 20}, {2, 20}, {64, 64}, {64, 64}},
     {{{0, 0}, {0, 1}, {0, 2}}, {{0, 0}, {0, 2}}}, 3},
    {"MutualAttention", {{2, 4, 20, 16}, {2, 4, 20, 16}, {2, 20}, {2, 4, 16, 100}, {2, 4, 100, 16}},
     {{{0, 0}, {0, 2}, {3, 3}}, {{0, 0}, {0, 2}, {3, 3}}}, 2},
};

static std::vector<DataType> float_types() {
#if NV_TENSORRT_MAJOR >= 10
  return {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
#else
  return {DataType::kFLOAT, DataType::kHALF};
#endif
}

#if NV_TENSORRT_MAJOR >= 10
static constexpr DataType kWord = DataType::kBOOL;
#else  // "DataType:kBOOL and DataType::kUINT8 are not supported", NvInferRuntimePlugin.h
static constexpr DataType kWord = DataType::kINT32;
#endif

// The descriptions of all inputs and outputs of a type.
static std::vector<PluginTensorDesc> described(Operator const& op, DataType type) {
  std::vector<PluginTensorDesc> all;
  for (size_t i = 0; i < op.inputs.size(); ++i)
    all.push_back({dims(op.inputs[i]), int(i) == op.words ? kWord : type,
                   TensorFormat::kLINEAR, 1.f});
  for (size_t i = 0; i < op.outputs.size(); ++i)
    all.push_back({dims({2}), i ? DataType::kFLOAT : type, TensorFormat::kLINEAR, 1.f});
  return all;
}

// supports(pos, all) accepts exactly what the operator's contract says.
template <class F> static void formats(Operator const& op, F const& supports) {
  for (DataType const type : float_types()) {
    auto all = described(op, type);
    for (size_t pos = 0; pos < all.size(); ++pos) {
      CHECK(supports(pos, all));
      auto const kept = all[pos];
      for (DataType const other : {DataType::kFLOAT, DataType::kHALF, DataType::kINT8,
                                   DataType::kINT32, DataType::kBOOL}) {
        all[pos].type = other;
        bool const first = pos == 0 && (other == DataType::kFLOAT || other == DataType::kHALF);
        CHECK(supports(pos, all) == (other == kept.type || first));
      }
      all[pos] = kept;
      all[pos].format = TensorFormat::kCHW32;
      CHECK(!supports(pos, all));
      all[pos] = kept;
    }
  }
}

template <class F> static void shapes(Operator const& op, F const& out_of) {
  static Expression pool[6][4];
  std::vector<DimsExprs> in(op.inputs.size());
  for (size_t i = 0; i < in.size(); ++i) {
    in[i].nbDims = static_cast<int>(op.inputs[i].size());
    for (int a = 0; a < in[i].nbDims; ++a) in[i].d[a] = &pool[i][a];
  }
  for (size_t o = 0; o < op.outputs.size(); ++o) {
    DimsExprs const found = out_of(o, in);
    CHECK(found.nbDims == int(op.outputs[o].size()));
    for (size_t a = 0; a < op.outputs[o].size(); ++a)
      CHECK(found.d[a] == in[op.outputs[o][a].first].d[op.outputs[o][a].second]);
    in[0].nbDims += 1;
    CHECK(out_of(o, in).nbDims == -1);
    in[0].nbDims -= 1;
    in.pop_back();
    CHECK(out_of(o, in).nbDims == -1);
    in.push_back({});
    in.back().nbDims = static_cast<int>(op.inputs.back().size());
    for (int a = 0; a < in.back().nbDims; ++a) in.back().d[a] = &pool[in.size() - 1][a];
  }
}

static bool alone;  // no registry, so errors come to our own logger
#if NV_TENSORRT_MAJOR >= 10
static std::vector<char const*> const suffixes{"", "_float32", "_float16", "_bfloat16"};
#else
static std::vector<char const*> const suffixes{"", "_float32", "_float16"};
#endif
static float const epsilon = 1e-4f, below = -1.f;
static int32_t const later = 9;

#if NV_TENSORRT_MAJOR >= 10
static void conform(Operator const& op, std::string const& name, IPluginCreatorInterface* any) {
  CHECK(any && !std::strcmp(any->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE"));
  auto* const creator = static_cast<IPluginCreatorV3One*>(any);
  CHECK(name == creator->getPluginName());
  bool const norm = op.words == 3 && op.inputs.size() == 6;
  CHECK(creator->getFieldNames()->nbFields == (norm ? 1 : 0));
  PluginField field{"epsilon", &epsilon, PluginFieldType::kFLOAT32, 1};
  PluginFieldCollection fields{1, &field}, none{0, nullptr};
  CHECK(creator->createPlugin("n", &none, TensorRTPhase::kBUILD) != nullptr);
  auto* const plugin = creator->createPlugin("n", &fields, TensorRTPhase::kBUILD);
  auto* const core = static_cast<IPluginV3OneCore*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
  auto* const build = static_cast<IPluginV3OneBuild*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
  CHECK(name == core->getPluginName() && !std::strcmp(core->getPluginNamespace(), "refedge"));
  int const inputs = int(op.inputs.size()), outputs = build->getNbOutputs();
  CHECK(outputs == int(op.outputs.size()));
  formats(op, [&](size_t pos, std::vector<PluginTensorDesc> const& all) {
    std::vector<DynamicPluginTensorDesc> dynamic(all.size());
    for (size_t i = 0; i < all.size(); ++i) dynamic[i].desc = all[i];
    return build->supportsFormatCombination(int(pos), dynamic.data(), inputs, outputs);
  });
  Builder builder;
  shapes(op, [&](size_t o, std::vector<DimsExprs> const& in) {
    DimsExprs out[2];
    if (build->getOutputShapes(in.data(), int(in.size()), nullptr, 0, out, outputs, builder)) {
      out[o] = DimsExprs{};
      out[o].nbDims = -1;
    }
    return out[o];
  });
  for (DataType const type : float_types()) {
    auto const all = described(op, type);
    std::vector<DataType> in;
    std::vector<DynamicPluginTensorDesc> dynamic(all.size());
    for (size_t i = 0; i < all.size(); ++i)
      in.push_back(all[i].type), dynamic[i] = {all[i], all[i].dims, all[i].dims, all[i].dims};
    DataType out[2];
    CHECK(!build->getOutputDataTypes(out, outputs, in.data(), inputs));
    CHECK(out[0] == type && (outputs == 1 || out[1] == DataType::kFLOAT));
    bool const room = build->getWorkspaceSize(dynamic.data(), inputs, dynamic.data() + inputs, outputs);
    CHECK(room == (outputs == 2));  // CrossAttention needs none
  }
  auto* const copy = plugin->clone();
  auto* const run = static_cast<IPluginV3OneRuntime*>(
      copy->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  auto const* const written = run->getFieldsToSerialize();
  auto* const again = creator->createPlugin("n", written, TensorRTPhase::kRUNTIME);
  CHECK(again);
  auto* const rerun = static_cast<IPluginV3OneRuntime*>(
      again->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  auto const* const rewritten = rerun->getFieldsToSerialize();
  CHECK(rewritten->nbFields == 2 &&
        *static_cast<float const*>(rewritten->fields[1].data) == epsilon);
  PluginField bad{"refedge_serialization", &later, PluginFieldType::kINT32, 1};
  PluginFieldCollection future{1, &bad};
  CHECK(!creator->createPlugin("n", &future, TensorRTPhase::kRUNTIME));
  field.data = &below;
  CHECK(!creator->createPlugin("n", &fields, TensorRTPhase::kBUILD));
  // without a driver, or with shapes that do not fit: an error that says so, never a crash
  auto all = described(op, DataType::kHALF);
  all[1].dims.d[1] += 1;
  CHECK(rerun->onShapeChange(all.data(), inputs, all.data() + inputs, outputs) != 0);
  void* const attached = rerun->attachToContext(nullptr);
  CHECK(attached);
  CHECK(!alone || logger.last.find("shapes do not belong together") != std::string::npos);
  delete plugin, delete copy, delete again, delete static_cast<IPluginV3*>(attached);
}
#else
static void conform(Operator const& op, std::string const& name, IPluginCreator* creator) {
  CHECK(creator && name == creator->getPluginName());
  PluginField field{"epsilon", &epsilon, PluginFieldType::kFLOAT32, 1};
  PluginFieldCollection fields{1, &field};
  auto* const plugin = static_cast<IPluginV2DynamicExt*>(creator->createPlugin("n", &fields));
  CHECK(name == plugin->getPluginType() && !std::strcmp(plugin->getPluginNamespace(), "refedge"));
  int const inputs = int(op.inputs.size()), outputs = plugin->getNbOutputs();
  CHECK(outputs == int(op.outputs.size()));
  formats(op, [&](size_t pos, std::vector<PluginTensorDesc> const& all) {
    return plugin->supportsFormatCombination(int(pos), all.data(), inputs, outputs);
  });
  Builder builder;
  shapes(op, [&](size_t o, std::vector<DimsExprs> const& in) {
    return plugin->getOutputDimensions(int(o), in.data(), int(in.size()), builder);
  });
  for (DataType const type : float_types()) {
    auto const all = described(op, type);
    CHECK(plugin->getOutputDataType(0, &type, 1) == type);
    CHECK(plugin->getOutputDataType(1, &type, 1) == DataType::kFLOAT);
    bool const room = plugin->getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputs);
    CHECK(room == (outputs == 2));  // CrossAttention needs none
  }
  std::vector<char> data(plugin->getSerializationSize());
  plugin->clone()->serialize(data.data());
  auto* const again = creator->deserializePlugin("n", data.data(), data.size());
  CHECK(again);
  std::vector<char> rewritten(again->getSerializationSize());
  again->serialize(rewritten.data());
  CHECK(rewritten == data);
  CHECK(!creator->deserializePlugin("n", data.data(), data.size() - 1));
  std::memcpy(data.data(), &later, sizeof later);
  CHECK(!creator->deserializePlugin("n", data.data(), data.size()));
  field.data = &below;
  CHECK(!creator->createPlugin("n", &fields));
  CHECK(!alone || logger.last.find("refedge: " + name) == 0);
  plugin->destroy(), again->destroy();
}
#endif

#if NV_TENSORRT_MAJOR >= 10
static char const* name_of(IPluginCreatorInterface* creator) {
  return static_cast<IPluginCreatorV3One*>(creator)->getPluginName();
}
#else
static char const* name_of(IPluginCreator* creator) { return creator->getPluginName(); }
#endif

int main(int count, char** words) {
  void* const tensorrt = count > 2 ? dlopen(words[2], RTLD_NOW | RTLD_GLOBAL) : nullptr;
  if (count > 2 && !tensorrt) return std::printf("%s\n", dlerror()), 2;
  if (count > 3) setenv("REFEDGE_PLUGINS_REGISTER", "1", 1);
  void* const library = dlopen(words[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) return std::printf("%s\n", dlerror()), 2;
  IPluginRegistry* registry = nullptr;
  alone = count == 2;
  if (!alone) {
    auto const get =
        reinterpret_cast<IPluginRegistry* (*)()>(dlsym(tensorrt, "getPluginRegistry"));
    registry = get();
    if (count == 3 && !registry->loadLibrary(words[1])) return std::printf("the registry refused it\n"), 2;
  } else {
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&finder);
  }
  int32_t made = 0;
#if NV_TENSORRT_MAJOR >= 10
  auto* const* const all = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(
      dlsym(library, "getCreators"))(made);
#else
  auto* const* const all = reinterpret_cast<IPluginCreator* const* (*)(int32_t&)>(
      dlsym(library, "getPluginCreators"))(made);
#endif
  where = "library";
  CHECK(made == int(operators.size() * suffixes.size()));
  for (auto const& op : operators)
    for (char const* suffix : suffixes) {
      where = op.name + std::string(suffix);
      auto* creator = all[0];
      for (int i = 0; i < made; ++i)
        if (where == name_of(all[i])) creator = all[i];
      if (registry) {
#if NV_TENSORRT_MAJOR >= 10
        creator = registry->getCreator(where.c_str(), "1", "refedge");
#else
        creator = registry->getPluginCreator(where.c_str(), "1", "refedge");
#endif
      }
      if (creator)
        conform(op, where, creator);
      else
        CHECK(!"the registry has no creator of that name");
    }
  std::printf("TensorRT %d.%d: %d checks, %d failed\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, checks,
              failures);
  return failures ? 1 : 0;
}
