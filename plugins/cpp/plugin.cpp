// The fused operators as TensorRT plugins: IPluginV3 for TensorRT 10 and 11, IPluginV2DynamicExt
// for 8.6, around the same launches. `refedge plugin build` compiles this file on the board.
//
// Namespace "refedge", version "1"; names as in ONNX, with or without the type, for example
// CrossAttention_float16. Inputs and outputs as in ../reference.py; `words` is boolean, for 8.6, whose
// plugins take no booleans, int32; weights of words and relevance are float32, all else is of one
// type. Layout is linear.
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "driver.h"

// cubins.inc: REFEDGE_CUBIN(87, "path") for every architecture
#define REFEDGE_CUBIN(sm, path)                                                          \
  __asm__(".section .rodata\n.balign 64\nrefedge_cubin_" #sm ":\n.incbin \"" path        \
          "\"\n.previous\n");                                                            \
  extern "C" __attribute__((visibility("hidden"))) unsigned char const refedge_cubin_##sm[];
#include "cubins.inc"
#undef REFEDGE_CUBIN

namespace refedge {

Cubin const* cubins() {
  static Cubin const all[] = {
#define REFEDGE_CUBIN(sm, path) {sm, refedge_cubin_##sm},
#include "cubins.inc"
#undef REFEDGE_CUBIN
      {0, nullptr}};
  return all;
}

namespace {

using namespace nvinfer1;

constexpr int32_t kSerialization = 1;  // of the fields below; others are refused
#if NV_TENSORRT_MAJOR >= 10
constexpr DataType kWord = DataType::kBOOL;
constexpr int kWordBytes = 1;
#else
constexpr DataType kWord = DataType::kINT32;
constexpr int kWordBytes = 4;
#endif
ILoggerFinder* finder = nullptr;

// To the logger of whoever calls, else to that of the library, else where all errors go.
void report(std::string const& message) {
  ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (!logger)
    if (void* const get = dlsym(RTLD_DEFAULT, "getLogger"))
      logger = reinterpret_cast<ILogger* (*)()>(get)();
  if (logger) logger->log(ILogger::Severity::kERROR, ("refedge: " + message).c_str());
  else std::fprintf(stderr, "refedge: %s\n", message.c_str());
}

// What all names of an operator share.
struct Kind {
  Operator op;
  int inputs, outputs, words;  // `words` is the index of that input
  int ranks[6];
};
constexpr Kind kKinds[] = {{kCrossAttention, 5, 1, 3, {3, 4, 4, 2, 3}},
                           {kNormAttention, 6, 2, 3, {3, 3, 3, 2, 2, 2}},
                           {kMutualAttention, 5, 2, 2, {4, 4, 2, 4, 4}}};
struct Name {
  char const* text;
  Kind const* kind;
};
constexpr Name kNames[] = {
    {"CrossAttention", &kKinds[0]},          {"CrossAttention_float32", &kKinds[0]},
    {"CrossAttention_float16", &kKinds[0]},  {"NormAttention", &kKinds[1]},
    {"NormAttention_float32", &kKinds[1]},   {"NormAttention_float16", &kKinds[1]},
    {"MutualAttention", &kKinds[2]},         {"MutualAttention_float32", &kKinds[2]},
    {"MutualAttention_float16", &kKinds[2]},
#if NV_TENSORRT_MAJOR >= 10
    {"CrossAttention_bfloat16", &kKinds[0]}, {"NormAttention_bfloat16", &kKinds[1]},
    {"MutualAttention_bfloat16", &kKinds[2]},
#endif
};

bool type_of(DataType given, Type& type) {
  if (given == DataType::kFLOAT) return type = kFloat, true;
  if (given == DataType::kHALF) return type = kHalf, true;
#if NV_TENSORRT_MAJOR >= 10
  if (given == DataType::kBF16) return type = kBfloat, true;
#endif
  return false;
}

// Sizes of a call from the inputs' dimensions; false if they do not belong together.
bool sizes(Kind const& kind, Dims const* const* in, Call& c) {
  auto is = [&](int i, std::initializer_list<int64_t> shape) {
    if (in[i]->nbDims != static_cast<int>(shape.size())) return false;
    int axis = 0;
    for (int64_t const size : shape)
      if (in[i]->d[axis++] != size) return false;
    return true;
  };
  auto at = [&](int i, int axis) -> int64_t {
    return axis < in[i]->nbDims && in[i]->d[axis] <= 0x7fffffff ? in[i]->d[axis] : -1;
  };
  int64_t b, n, k = 1, t, h = 1, w = 1;
  bool fits;
  if (kind.op == kCrossAttention) {
    b = at(0, 0), n = at(0, 1), k = at(0, 2), h = at(1, 2), t = at(1, 3), w = at(2, 3);
    fits = is(0, {b, n, k}) && is(1, {b, k, h, t}) && is(2, {b, h, t, w}) && is(3, {b, t}) &&
           is(4, {b, h, t});
  } else if (kind.op == kNormAttention) {
    b = at(0, 0), k = at(0, 1), n = at(0, 2), t = at(1, 1);
    fits = is(0, {b, k, n}) && is(1, {b, t, k}) && is(2, {b, k, t}) && is(3, {b, t}) &&
           is(4, {k, k}) && is(5, {k, k});
  } else {
    b = at(0, 0), h = at(0, 1), t = at(0, 2), w = at(0, 3), n = at(3, 3);
    fits = is(0, {b, h, t, w}) && is(1, {b, h, t, w}) && is(2, {b, t}) && is(3, {b, h, w, n}) &&
           is(4, {b, h, n, w});
  }
  c.batch = static_cast<int>(b), c.pixels = static_cast<int>(n), c.channels = static_cast<int>(k);
  c.words = static_cast<int>(t), c.heads = static_cast<int>(h), c.width = static_cast<int>(w);
  return fits;
}

// What both generations of the interface do.
class Attention {
 public:
  Attention(Name const& name, float epsilon) : name_(&name), epsilon_(epsilon) {}
  Name const& name() const { return *name_; }
  Kind const& kind() const { return *name_->kind; }

  bool supports(int pos, PluginTensorDesc const& at, PluginTensorDesc const& first) const {
    if (at.format != TensorFormat::kLINEAR) return false;
    if (pos == kind().words) return at.type == kWord;
    if (pos == kind().inputs + 1) return at.type == DataType::kFLOAT;
    Type type;
    return type_of(at.type, type) && at.type == first.type;
  }

  // False where a graph gives too few inputs, or one of another rank.
  bool shape(int output, DimsExprs const* in, int inputs, DimsExprs& out) const {
    bool fits = inputs == kind().inputs;
    for (int i = 0; fits && i < inputs; ++i) fits = in[i].nbDims == kind().ranks[i];
    if (!fits) return report(std::string(name_->text) + ": inputs of other shapes"), false;
    auto set = [&out](std::initializer_list<IDimensionExpr const*> dims) {
      out.nbDims = 0;
      for (auto const* d : dims) out.d[out.nbDims++] = d;
    };
    if (kind().op == kCrossAttention)
      set({in[0].d[0], in[0].d[1], in[2].d[3]});
    else if (kind().op == kMutualAttention)
      set({in[0].d[0], in[0].d[2], in[3].d[3]});
    else if (output == 0)
      set({in[0].d[0], in[0].d[1], in[0].d[2]});
    else
      set({in[0].d[0], in[0].d[2]});
    return true;
  }

  // For upper bounds, of which each letter's is read from one input: several need not agree.
  size_t workspace(DataType given, Dims const* const* in) const {
    Call call{};
    Type type;
    if (!type_of(given, type)) return 0;
    sizes(kind(), in, call);
    return plan(kind().op, type, call).workspace;
  }

  // Check the shapes and load the kernels, before anything is captured.
  bool prepare(PluginTensorDesc const* in) {
    Call call;
    Plan launches;
    std::string why;
    if (decide(in, call, launches, why) && find(launches, why)) return true;
    report(std::string(name_->text) + ": " + why);
    return false;
  }

  bool run(PluginTensorDesc const* in, void const* const* inputs, void* const* outputs,
           void* workspace, void* stream) {
    Call call;
    Plan launches;
    std::string why;
    bool good = decide(in, call, launches, why) && find(launches, why);
    if (good && launches.workspace && !workspace)
      good = false, why = "the profile's largest shapes are beyond the limits of the kernels";
    if (good) {
      for (int i = 0; i < kind().inputs; ++i) call.in[i] = inputs[i];
      for (int i = 0; i < kind().outputs; ++i) call.out[i] = outputs[i];
      call.work = workspace;
      align(kind().op, type_, call);
      Driver* const driver = Driver::get(why);
      for (int i = 0; good && i < launches.launches; ++i)
        good = driver->launch(kernels_[i], launches.launch[i], call, stream, why);
    }
    if (!good) report(std::string(name_->text) + ": " + why);
    return good;
  }

 protected:
  Name const* name_;
  float epsilon_;

 private:
  bool decide(PluginTensorDesc const* in, Call& call, Plan& launches, std::string& why) {
    Dims const* dims[6];
    for (int i = 0; i < kind().inputs; ++i) dims[i] = &in[i].dims;
    call = Call{};
    call.epsilon = epsilon_;
    call.word = kWordBytes;
    Type type;
    if (!type_of(in[0].type, type)) return why = "inputs of a type without kernels", false;
    if (!sizes(kind(), dims, call)) return why = "shapes do not belong together", false;
    if (type != type_) kernels_.clear();
    type_ = type;
    launches = plan(kind().op, type, call);
    if (!launches.launches)
      return why = "more than 128 words, 1024 channels, or a size of zero", false;
    return true;
  }

  bool find(Plan const& launches, std::string& why) {
    if (!kernels_.empty()) return true;
    static char const* const suffix[] = {"_float32", "_float16", "_bfloat16"};
    Driver* const driver = Driver::get(why);
    if (!driver) return false;
    std::vector<void*> found;
    for (int i = 0; i < launches.launches; ++i) {
      void* const one =
          driver->kernel(std::string(launches.launch[i].kernel) + suffix[type_], why);
      if (!one) return false;
      found.push_back(one);
    }
    kernels_ = found;
    return true;
  }

  Type type_ = kFloat;
  std::vector<void*> kernels_;  // of this plugin's context, for type_
};

PluginFieldCollection const* creator_fields(Kind const& kind) {
  static PluginField epsilon{"epsilon", nullptr, PluginFieldType::kFLOAT32, 1};
  static PluginFieldCollection const none{0, nullptr}, one{1, &epsilon};
  return kind.op == kNormAttention ? &one : &none;
}

// False if a field is not what this version writes.
bool read_fields(PluginFieldCollection const* given, float& epsilon) {
  for (int i = 0; given && i < given->nbFields; ++i) {
    PluginField const& f = given->fields[i];
    if (!std::strcmp(f.name, "epsilon")) {
      if (f.type != PluginFieldType::kFLOAT32 || f.length != 1 || !f.data) return false;
      std::memcpy(&epsilon, f.data, sizeof epsilon);
    } else if (!std::strcmp(f.name, "refedge_serialization")) {
      int32_t version;
      if (f.type != PluginFieldType::kINT32 || f.length != 1 || !f.data) return false;
      std::memcpy(&version, f.data, sizeof version);
      if (version != kSerialization) return false;
    }
  }
  return epsilon >= 0.f;
}

void refuse(Name const& name) {
  report(std::string(name.text) + ": fields of another version, or an epsilon below zero");
}

#if NV_TENSORRT_MAJOR >= 10

class Plugin final : public IPluginV3,
                     public IPluginV3OneCore,
                     public IPluginV3OneBuild,
                     public IPluginV3OneRuntime,
                     public Attention {
 public:
  using Attention::Attention;
  Plugin(Plugin const& other) : Attention(*other.name_, other.epsilon_) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    if (type == PluginCapabilityType::kBUILD) return static_cast<IPluginV3OneBuild*>(this);
    if (type == PluginCapabilityType::kRUNTIME) return static_cast<IPluginV3OneRuntime*>(this);
    return static_cast<IPluginV3OneCore*>(this);
  }
  IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(*this); }

  char const* getPluginName() const noexcept override { return name_->text; }
  char const* getPluginVersion() const noexcept override { return "1"; }
  char const* getPluginNamespace() const noexcept override { return "refedge"; }

  int32_t getNbOutputs() const noexcept override { return kind().outputs; }
  bool supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* all, int32_t inputs,
                                 int32_t outputs) noexcept override {
    return inputs == kind().inputs && outputs == kind().outputs &&
           supports(pos, all[pos].desc, all[0].desc);
  }
  int32_t getOutputDataTypes(DataType* out, int32_t outputs, DataType const* in,
                             int32_t) const noexcept override {
    for (int i = 0; i < outputs; ++i) out[i] = i ? DataType::kFLOAT : in[0];
    return 0;
  }
  int32_t getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t,
                          DimsExprs* out, int32_t outputs, IExprBuilder&) noexcept override {
    bool good = outputs == kind().outputs;
    for (int i = 0; good && i < outputs; ++i) good = shape(i, in, inputs, out[i]);
    return good ? 0 : -1;
  }
  int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                          int32_t) noexcept override {
    return 0;
  }
  size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    Dims const* most[6];
    for (int i = 0; i < kind().inputs; ++i) most[i] = &in[i].max;
    return workspace(in[0].desc.type, most);
  }

  int32_t onShapeChange(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*,
                        int32_t) noexcept override {
    return prepare(in) ? 0 : -1;
  }
  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return run(in, inputs, outputs, workspace, stream) ? 0 : -1;
  }
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
  PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    fields_[0] = {"refedge_serialization", &kSerialization, PluginFieldType::kINT32, 1};
    fields_[1] = {"epsilon", &epsilon_, PluginFieldType::kFLOAT32, 1};
    written_ = {2, fields_};
    return &written_;
  }

 private:
  PluginField fields_[2];
  PluginFieldCollection written_;
};

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(Name const& name) : name_(name) {}
  char const* getPluginName() const noexcept override { return name_.text; }
  char const* getPluginVersion() const noexcept override { return "1"; }
  char const* getPluginNamespace() const noexcept override { return "refedge"; }
  PluginFieldCollection const* getFieldNames() noexcept override {
    return creator_fields(*name_.kind);
  }
  IPluginV3* createPlugin(char const*, PluginFieldCollection const* given,
                          TensorRTPhase) noexcept override {
    float epsilon = 1e-5f;
    if (read_fields(given, epsilon)) return new (std::nothrow) Plugin(name_, epsilon);
    refuse(name_);
    return nullptr;
  }

 private:
  Name const& name_;
};
using AnyCreator = IPluginCreatorInterface;

#else  // TensorRT 8.6

class Plugin final : public IPluginV2DynamicExt, public Attention {
 public:
  using Attention::Attention;
  Plugin(Plugin const& other) : Attention(*other.name_, other.epsilon_), space_(other.space_) {}

  IPluginV2DynamicExt* clone() const noexcept override { return new (std::nothrow) Plugin(*this); }
  char const* getPluginType() const noexcept override { return name_->text; }
  char const* getPluginVersion() const noexcept override { return "1"; }
  void setPluginNamespace(char const* space) noexcept override { space_ = space ? space : ""; }
  char const* getPluginNamespace() const noexcept override { return space_.c_str(); }
  int32_t getNbOutputs() const noexcept override { return kind().outputs; }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }

  DimsExprs getOutputDimensions(int32_t output, DimsExprs const* in, int32_t inputs,
                                IExprBuilder&) noexcept override {
    DimsExprs out{};
    if (!shape(output, in, inputs, out)) out.nbDims = -1;
    return out;
  }
  DataType getOutputDataType(int32_t output, DataType const* in, int32_t) const noexcept override {
    return output ? DataType::kFLOAT : in[0];
  }
  bool supportsFormatCombination(int32_t pos, PluginTensorDesc const* all, int32_t inputs,
                                 int32_t outputs) noexcept override {
    return inputs == kind().inputs && outputs == kind().outputs && supports(pos, all[pos], all[0]);
  }
  void configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                       int32_t) noexcept override {}
  size_t getWorkspaceSize(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*,
                          int32_t) const noexcept override {
    Dims const* dims[6];
    for (int i = 0; i < kind().inputs; ++i) dims[i] = &in[i].dims;
    return workspace(in[0].type, dims);
  }
  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return run(in, inputs, outputs, workspace, stream) ? 0 : -1;
  }

  size_t getSerializationSize() const noexcept override { return sizeof(int32_t) + sizeof(float); }
  void serialize(void* buffer) const noexcept override {
    std::memcpy(buffer, &kSerialization, sizeof(int32_t));
    std::memcpy(static_cast<char*>(buffer) + sizeof(int32_t), &epsilon_, sizeof(float));
  }

 private:
  std::string space_ = "refedge";
};

class Creator final : public IPluginCreator {
 public:
  explicit Creator(Name const& name) : name_(name) {}
  char const* getPluginName() const noexcept override { return name_.text; }
  char const* getPluginVersion() const noexcept override { return "1"; }
  void setPluginNamespace(char const* space) noexcept override { space_ = space ? space : ""; }
  char const* getPluginNamespace() const noexcept override { return space_.c_str(); }
  PluginFieldCollection const* getFieldNames() noexcept override {
    return creator_fields(*name_.kind);
  }
  IPluginV2* createPlugin(char const*, PluginFieldCollection const* given) noexcept override {
    float epsilon = 1e-5f;
    if (read_fields(given, epsilon)) return made(epsilon);
    refuse(name_);
    return nullptr;
  }
  IPluginV2* deserializePlugin(char const*, void const* data, size_t size) noexcept override {
    int32_t version = 0;
    float epsilon = -1.f;
    if (size == sizeof version + sizeof epsilon) {
      std::memcpy(&version, data, sizeof version);
      std::memcpy(&epsilon, static_cast<char const*>(data) + sizeof version, sizeof epsilon);
    }
    if (version == kSerialization && epsilon >= 0.f) return made(epsilon);
    refuse(name_);
    return nullptr;
  }

 private:
  IPluginV2* made(float epsilon) const {
    auto* const plugin = new (std::nothrow) Plugin(name_, epsilon);
    if (plugin) plugin->setPluginNamespace(space_.c_str());
    return plugin;
  }
  Name const& name_;
  std::string space_ = "refedge";
};
using AnyCreator = IPluginCreator;

#endif

AnyCreator* const* creators(int32_t& count) {
  static auto const all = [] {
    std::vector<AnyCreator*> made;  // for the life of the library, as the registry keeps them
    for (Name const& name : kNames) made.push_back(new Creator(name));
    return made;
  }();
  count = static_cast<int32_t>(all.size());
  return all.data();
}

// For hosts that only open a library, such as Triton by LD_PRELOAD: with REFEDGE_PLUGINS_REGISTER
// set, the creators enter the registry of the TensorRT that is there. A registry of another
// generation has another layout and is left alone.
__attribute__((constructor)) void enter_registry() {
  if (!std::getenv("REFEDGE_PLUGINS_REGISTER")) return;
  void* from = RTLD_DEFAULT;
  if (!dlsym(from, "getPluginRegistry"))
    from = dlopen(("libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR)).c_str(), RTLD_LAZY);
  if (!dlsym(from, "getPluginRegistry") || !dlsym(from, "getInferLibVersion")) return;
  int32_t const version = reinterpret_cast<int32_t (*)()>(dlsym(from, "getInferLibVersion"))();
  if (version / (version < 10000 ? 1000 : 10000) != NV_TENSORRT_MAJOR) return;
  IPluginRegistry* const registry =
      reinterpret_cast<IPluginRegistry* (*)()>(dlsym(from, "getPluginRegistry"))();
  int32_t count = 0;
  AnyCreator* const* const all = creators(count);
  for (int32_t i = 0; i < count; ++i) registry->registerCreator(*all[i], "refedge");
}

}  // namespace
}  // namespace refedge

// What IPluginRegistry::loadLibrary and trtexec's --dynamicPlugins look up.
#define REFEDGE_EXPORT extern "C" __attribute__((visibility("default")))

REFEDGE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { refedge::finder = finder; }
#if NV_TENSORRT_MAJOR >= 10
REFEDGE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  return refedge::creators(count);
}
#else
REFEDGE_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
  return refedge::creators(count);
}
#endif
